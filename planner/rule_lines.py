"""The table of op rules: one line per op (the language is in `rule_pattern`), with how partial sums pass.

`("*b, ... -> *b", "add sub")` reads: all tensors broadcast together and every loop may be split. Where a rule depends on the
flags of a call, the function named beside it (in `rule_variants`) writes the line. Adding an op is adding a line;
tests/test_rules.py then verifies it against the op itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import rule_experts, rule_heads, rule_made, rule_packed, rule_patches
from . import rule_variants as variants
from .rule_types import Linear, Rule

EACH: Linear = ((0,),)
"""A partial sum of the first operand passes."""
BOTH: Linear = ((0,), (1,))
"""A partial sum of either operand passes, the other one whole."""


def _same(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


_POINT = Rule("*b, ... -> *b")
_COPY = replace(_POINT, linear=EACH, flops="none")

ELEMENTWISE: Mapping[str, Rule] = {
    **_same(_POINT, """
        abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh
        bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max
        clamp_min clip copysign cos cosh digamma elu eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide
        fmax fmin fmod frac ge gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot
        i0 isclose isfinite isinf isnan isneginf isposinf ldexp le leaky_relu less less_equal lgamma log log10 log1p log2
        log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt maximum minimum mish
        nan_to_num ne nextafter not_equal reciprocal relu relu6 remainder round rsqrt selu sgn
        sigmoid sign signbit silu sin sinc sinh softplus softshrink special_erfcx sqrt square tan tanh threshold trunc
        xlogy __and__ __or__ __xor__ __lshift__ __rshift__ ones_like zeros_like full_like fill
        gelu_backward silu_backward tanh_backward sigmoid_backward threshold_backward softplus_backward
        """),
    **_same(replace(_POINT, linear=EACH), "neg negative deg2rad rad2deg"),
    **_same(_COPY, "clone contiguous alias lift lift_fresh lift_fresh_copy positive conj resolve_conj"),
    **_same(replace(_COPY, kind="view"), "detach"),
    **_same(replace(_COPY, linear=((1,),)), "copy"),
    **_same(replace(_COPY, adapt=variants.cast), "to _to_copy type_as"),
    **_same(replace(_POINT, adapt=variants.add), "add sub subtract rsub"),
    **_same(replace(_POINT, adapt=variants.mul), "mul multiply"),
    **_same(replace(_POINT, adapt=variants.div), "div divide true_divide"),
    **_same(replace(_POINT, adapt=variants.power), "pow"),
    **_same(replace(_POINT, adapt=variants.where), "where"),
    **_same(replace(_POINT, adapt=variants.masked_fill), "masked_fill"),
    **_same(replace(_POINT, adapt=variants.lerp), "lerp"),
    **_same(replace(_POINT, linear=((0, 1), (0, 2))), "addcmul"),
    **_same(replace(_POINT, linear=((0, 1),)), "addcdiv"),
    **_same(replace(_POINT, kind="random"), "bernoulli rand_like randn_like randint_like empty_like"),
    **_same(Rule("*b -> *b", EACH, "random"), "dropout"),
    **_same(Rule("*b -> *b, *b", (), "random"), "native_dropout"),
    **_same(Rule("*b -> *b", (), "random"), "alpha_dropout"),
    **_same(Rule("z c *s! -> z c *s!", EACH, "random"), "feature_dropout"),
}  # fmt: skip

_MATMUL = Rule("*b k, n k -> *b n", BOTH, "matmul", "contract")
_ADDED = replace(_MATMUL, linear=((0, 1), (0, 2)), adapt=variants.added_matmul)

MATMULS: Mapping[str, Rule] = {
    **_same(replace(_MATMUL, adapt=variants.linear), "linear"),
    **_same(replace(_MATMUL, line="m k, k n -> m n"), "mm"),
    **_same(replace(_MATMUL, line="b m k, b k n -> b m n"), "bmm"),
    **_same(replace(_MATMUL, line="*b m k, *b k n -> *b m n", adapt=variants.matmul), "matmul"),
    **_same(replace(_MATMUL, line="m k, k -> m"), "mv"),
    **_same(replace(_MATMUL, line="k, k -> "), "dot vdot"),
    **_same(replace(_MATMUL, line="m, n -> m n"), "outer ger"),
    **_same(replace(_ADDED, line="m n, m k!, k! n -> m n"), "addmm"),
    **_same(replace(_ADDED, line="m, m k!, k! -> m"), "addmv"),
    **_same(replace(_ADDED, line="b m n, b m k!, b k! n -> b m n"), "baddbmm"),
    **_same(replace(_MATMUL, adapt=variants.einsum), "einsum"),
    **_same(replace(_MATMUL, adapt=variants.conv, kind="conv"),
            "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_same(replace(_MATMUL, line="*b i, *b j, o i j -> *b o", linear=((0,), (1,), (2,)), adapt=variants.bilinear), "bilinear"),
    **_same(Rule("*b s k!, *b t! k!, *b t! e! -> *b s e!", ((2,),), "attention", "attention", adapt=variants.attention),
            "scaled_dot_product_attention"),
}  # fmt: skip

_NORM = Rule("*b @n!, @n!, @n! -> *b @n!, *b, *b", kind="norm", flops="norm", adapt=variants.normalized)
_ALONG = Rule("*b @d! -> *b @d!", kind="norm", flops="norm", dims=(1, "dim"))
_CHANNELS = ((0, "input"), (1, "weight"), (2, "bias"), (3, "running_mean"), (4, "running_var"))

NORMS: Mapping[str, Rule] = {
    **_same(_ALONG, "softmax log_softmax _softmax _log_softmax"),
    **_same(replace(_NORM, slots=((0, "input"), (2, "weight"), (3, "bias"))), "layer_norm native_layer_norm"),
    **_same(replace(_NORM, line="*b @n!, @n! -> *b @n!, *b", slots=((0, "input"), (2, "weight"))), "rms_norm _fused_rms_norm"),
    **_same(Rule("z (g c!) *s!, (g c!), (g c!) -> z (g c!) *s!", kind="norm", flops="norm",
                 slots=((0, "input"), (2, "weight"), (3, "bias")), adapt=variants.group_norm), "group_norm"),
    **_same(Rule("z (g c!) *s!, (g c!), (g c!) -> z (g c!) *s!, z g, z g", kind="norm", flops="norm",
                 slots=((0, "input"), (1, "weight"), (2, "bias")), adapt=variants.group_norm), "native_group_norm"),
    **_same(Rule("z c *s, c, c, c, c -> z c *s, c, c, c, c", kind="norm", flops="norm", slots=_CHANNELS,
                 adapt=variants.batch_norm), "batch_norm native_batch_norm"),
    **_same(Rule("z c *s, c, c, c, c -> z c *s, c, c, c, c", kind="norm", flops="norm", slots=_CHANNELS,
                 implementation={"z": "batch_norm"}, adapt=variants.batch_norm), "_native_batch_norm_legit_functional"),
    **_same(Rule("z c *s!, c, c, c, c -> z c *s!", kind="norm", flops="norm", slots=_CHANNELS,
                 adapt=variants.instance_norm), "instance_norm"),
}  # fmt: skip

_SUM = Rule("*b @d -> *b", EACH, "reduction", "operand", dims=(1, "dim"), adapt=variants.without_dtype)
_WHOLE = Rule("*b @d! -> *b, *b", (), "reduction", "operand", dims=(1, "dim"))

REDUCTIONS: Mapping[str, Rule] = {
    **_same(_SUM, "sum mean"),
    **_same(replace(_SUM, linear=(), adapt=None), "count_nonzero nansum"),
    **_same(_WHOLE, "amax amin argmax argmin aminmax all any prod var std var_mean std_mean logsumexp median nanmedian"),
    **_same(replace(_WHOLE, adapt=variants.extremum), "max min"),
    **_same(replace(_WHOLE, dims=(2, "dim")), "norm linalg_vector_norm"),
    **_same(replace(_WHOLE, dims=(2, "dim", -1)), "kthvalue"),
    **_same(replace(_WHOLE, dims=(1, "dim", -1)), "mode"),
    **_same(Rule("*b @d! -> *b @d!", EACH, "reduction", "operand", dims=(1, "dim"), adapt=variants.without_dtype), "cumsum"),
    **_same(Rule("*b @d! -> *b @d!, *b @d!", (), "reduction", "operand", dims=(1, "dim")), "cumprod cummax cummin logcumsumexp"),
    **_same(Rule("*b @d! -> *b @d!, *b @d!", (), "other", "operand", dims=(1, "dim", -1)), "sort argsort"),
    **_same(Rule("d! *b -> d! *b", (), "other", "operand"), "msort"),
    **_same(Rule("*b @d! -> *b @e!, *b @e!", (), "other", "operand", dims=(2, "dim", -1)), "topk"),
}  # fmt: skip

_TABLE = Rule("v h, *b -> *b h", EACH, "embedding", "none", {"v": "vocab_embedding"}, adapt=variants.embedding)
_MOVE = Rule("*b -> *b", EACH, "other", "none")

LOOKUPS: Mapping[str, Rule] = {
    **_same(_TABLE, "embedding"),
    **_same(replace(_MOVE, line="*b @d!, e -> *b @e", dims=(1, "dim")), "index_select"),
    **_same(replace(_MOVE, adapt=variants.gather), "gather"),
    **_same(replace(_MOVE, adapt=variants.index), "index"),
    **_same(replace(_MOVE, adapt=variants.index_put), "index_put _unsafe_index_put"),
    **_same(replace(_MOVE, adapt=variants.scatter), "scatter scatter_add scatter_reduce"),
    **_same(replace(_MOVE, line="*b @m! -> *b @m!", dims=(-2, -1)), "triu tril"),
    **_same(replace(_MOVE, line="*b @d! -> *b @d!", dims=(2, "dims")), "roll"),
    **_same(replace(_MOVE, line="*b @d! -> *b @d!", dims=(1, "dims")), "flip"),
    **_same(replace(_MOVE, line="*b @d!, *b @p!, *b @q! -> *b @e!", dims=(2, "dim", -1), linear=((0, 1, 2),),
                    slots=((0, "self"), (3, "prepend"), (4, "append"))), "diff"),
    **_same(Rule("*b, n! -> *b", (), "other"), "bucketize"),
    **_same(Rule("*b, *t! -> *b", (), "other", "operand"), "isin"),
    **_same(Rule("*b! -> n!", (), "other", "operand", adapt=variants.histogram), "histc"),
    **_same(Rule("*b p m!, *b r m! -> *b p r", (), "matmul", "contract"), "cdist"),
    **_same(Rule("*b @d!, *b @d! -> *b", (), "reduction", "operand", dims=(2, "dim", 1)), "cosine_similarity"),
    **_same(Rule("*b -> *b c!", (), "other", "none"), "one_hot"),
    **_same(Rule("z c *s, c -> z c *s"), "prelu"),
}  # fmt: skip

_POOL = Rule("*b @s! -> *b @t!, *b @t!", (), "reduction", "operand", adapt=variants.last_dims)

SPATIAL: Mapping[str, Rule] = {
    **_same(_POOL, "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices "
                   "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_same(replace(_POOL, linear=EACH),
            "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
            "_adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
            "_upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_trilinear3d reflection_pad1d reflection_pad2d "
            "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"),
    **_same(Rule("z c *s!, z *t p! -> z c *t", EACH, "other"), "grid_sampler grid_sampler_2d grid_sampler_3d"),
    **_same(Rule("z c *s! -> z (c k!) l!", EACH, "other", "none"), "im2col"),
}  # fmt: skip

_LOSS = Rule("*b, ... -> ", kind="loss", flops="operand")

LOSSES: Mapping[str, Rule] = {
    **_same(Rule("*b @v, *b -> ", (), "loss", "norm", {"v": "vocab_loss"}, adapt=variants.cross_entropy), "cross_entropy_loss"),
    **_same(replace(_LOSS, adapt=variants.nll), "nll_loss nll_loss2d nll_loss_nd nll_loss_forward nll_loss2d_forward"),
    **_same(replace(_LOSS, adapt=variants.reduction(2)), "mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss kl_div"),
    **_same(replace(_LOSS, adapt=variants.reduction(3)), "binary_cross_entropy"),
    **_same(replace(_LOSS, adapt=variants.reduction(4)), "binary_cross_entropy_with_logits"),
}  # fmt: skip

FUSED: Mapping[str, Rule] = {
    "shardwright.gated": Rule("*b, *b -> *b", ((1,),)),
    "shardwright.by_result": Rule("*b -> *b"),
    "shardwright.rotary": Rule("*b d!, *b c!, *b e! -> *b d", EACH),
    "shardwright.rms_norm": Rule("*b n!, n -> *b n", kind="norm", flops="norm", slots=((0, "x"), (1, "weight"))),
    rule_made.CONV: Rule(
        "z (g i) *s!, (g o) i *k! -> z (g o) *t!", BOTH, "conv", "folded_conv", adapt=rule_made.folded_conv
    ),
    rule_made.LINEAR: Rule("*b k, n k, ... -> *b n", BOTH, "matmul", "contract", adapt=rule_made.linear_sum),
    rule_made.REMADE: Rule("*b k, n k, ... -> *b n", ((1,),), "matmul", "contract", adapt=rule_made.remade_linear),
}
"""Composite ops of passes/fuse."""

LINES: Mapping[str, Rule] = {
    **ELEMENTWISE, **MATMULS, **NORMS, **REDUCTIONS, **LOOKUPS, **SPATIAL, **LOSSES, **FUSED,
    rule_experts.TARGET: rule_experts.RULE, rule_heads.TARGET: rule_heads.RULE, rule_patches.TARGET: rule_patches.RULE,
    rule_packed.TARGET: rule_packed.RULE,
}  # fmt: skip
"""Every op with a line, by overload packet."""
