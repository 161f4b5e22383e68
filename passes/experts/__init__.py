"""Mixture-of-experts regions: from the routed tokens to their combined outputs, one op of the captured graph."""
