"""MODEL on the command line: how a name becomes a module and example inputs, and how a plan's `source` rebuilds them.

    hf:config.json      a Hugging Face config file (the class is architectures[0], else the causal-LM auto class)
    hf:NAME             a config shipped with the package (`shipped()` lists them)
    file.py:function    a function of `batch` and `seq` (or fewer) that returns a model and its example inputs

Everything can be built on the meta device, without memory. Weights and inputs are random, a function of the seed alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import profiles
from ..errors import PlanMismatch, UsageError
from ..garbage import held_back
from ..planner.plan import Source
from .diagnose import user_line

MODELS = Path(profiles.__file__).parent / "data" / "models"
DEFAULT_SEQ = 1024
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Loaded:
    """A model with example inputs; `kind` is "language", "encoder-decoder", "image" or "function"; `seq` is None without one."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: Source
    batch: int
    seq: int | None
    kind: str


def shipped() -> tuple[str, ...]:
    """Names that `hf:NAME` accepts."""
    return tuple(sorted(path.stem for path in MODELS.glob("*.json")))


def load_model(
    name: str,
    *,
    batch: int,
    seq: int | None = None,
    device: str = "meta",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Build what a MODEL argument names, with `batch` sequences (or images) of example inputs.

    `seq` None is min(1024, positions) for language models. Raises UsageError for anything that cannot be built.
    """
    if batch < 1 or (seq is not None and seq < 1):
        raise UsageError(f"batch and seq must be positive, not {batch} and {seq}")
    if name.startswith("hf:"):
        config = _read_config(name.removeprefix("hf:"))
        with held_back():
            return _hugging_face(name, config, batch=batch, seq=seq, device=device, seed=seed, dtype=dtype)
    file, separator, function = name.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise UsageError(
            f"{name!r} is not a model; write hf:NAME (one of {', '.join(shipped())}), hf:config.json or file.py:function"
        )
    with held_back():
        return _from_function(name, file, function, batch=batch, seq=seq, device=device, seed=seed, dtype=dtype)


def rebuild(
    source: Source, *, device: str = "cpu", batch: int | None = None, dtype: torch.dtype = torch.float32
) -> Loaded:
    """Build the model of a plan from its `source` alone; `batch` overrides the source's.

    Raises PlanMismatch where the file is not the one that was planned, UsageError for a source that cannot be rebuilt.
    """
    options: dict[str, Any] = {
        "batch": batch or source.batch,
        "seq": source.seq,
        "device": device,
        "seed": source.seed,
        "dtype": dtype,
    }
    if source.kind == "hf" and source.config is not None:
        return _hugging_face(source.model, dict(source.config), **options)
    if source.kind == "function" and source.file and source.function:
        if (found := _digest(Path(source.file))) != source.sha256:
            raise PlanMismatch(
                f"{source.file} has changed since it was planned (sha256 {found}, planned {source.sha256}); plan again"
            )
        return _from_function(source.model, source.file, source.function, **options)
    raise UsageError(
        f"the plan was made from a live module ({source.model}); load it with shardwright.apply_plan in your script"
    )


def _read_config(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.suffix:
        path = MODELS / f"{name}.json"
        if not path.is_file():
            raise UsageError(
                f"no shipped config {name!r}; there are {', '.join(shipped())}; or give hf:path/to/config.json"
            )
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UsageError(f'{path} is no Hugging Face config: it has no "model_type"')
    return config


def _hugging_face(
    name: str, document: dict[str, Any], *, batch: int, seq: int | None, device: str, seed: int, dtype: torch.dtype
) -> Loaded:
    try:
        import transformers
    except ImportError as error:
        raise UsageError("hf: models need transformers: pip install 'shardwright[hf]'") from error
    with _listed_once(transformers):
        config = _config(transformers, name, document)
        cls = _model_class(transformers, name, config)
    with _seeded(seed, device, dtype), _clear(f"building {name}"):
        model = cls(config)
    if getattr(config, "_experts_implementation", None) == "eager" and hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError):  # not every model has experts
            model.set_experts_implementation("grouped_mm")
    if vars(model).get("loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # what it takes for no type, after a warning
    model.train()
    kwargs, seq, kind = _inputs(model, config, name, batch, seq, device, seed, dtype)
    source = Source("hf", name, batch, seq, config=document, seed=seed)
    return Loaded(model, (), kwargs, source, batch, seq, kind)


@contextlib.contextmanager
def _listed_once(transformers: Any) -> Iterator[None]:
    """Transformers reads the sources of all its models when imported, and again for the first model: give it the first list.

    Its own cache keeps one folder under two names (tried: 5.23). Where it does not work that way, nothing changes.
    """
    module = transformers.utils.import_utils
    read = getattr(module, "create_import_structure_from_path", None)
    if read is None:
        yield
        return

    def listed(path: str | Path) -> Any:
        folder = Path(path)
        return read(folder.parent if folder.name == "__init__.py" else path)

    module.create_import_structure_from_path = listed
    try:
        yield
    finally:
        module.create_import_structure_from_path = read


def _config(transformers: Any, name: str, document: dict[str, Any]) -> Any:
    """The config object: caches off, no stored dtype."""
    kind = document["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise UsageError(f"{name}: transformers {transformers.__version__} knows no model_type {kind!r}")
    plain = {k: v for k, v in document.items() if k not in ("dtype", "torch_dtype")}
    with _clear(f"the config of {name}"):
        config = transformers.CONFIG_MAPPING[kind].from_dict(plain)
    config.use_cache = False
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    return config


def _model_class(transformers: Any, name: str, config: Any) -> Callable[[Any], nn.Module]:
    architectures = getattr(config, "architectures", None)
    if architectures:
        cls = getattr(transformers, architectures[0], None)
        if cls is None:
            raise UsageError(f"{name}: transformers {transformers.__version__} has no class {architectures[0]}")
        return cls  # type: ignore[no-any-return]
    auto = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise UsageError(
            f'{name}: {type(config).__name__} has no causal language model; name a class in "architectures"'
        )
    return auto._model_mapping[type(config)]  # type: ignore[no-any-return]


def _inputs(
    model: nn.Module, config: Any, name: str, batch: int, seq: int | None, device: str, seed: int, dtype: torch.dtype
) -> tuple[dict[str, Any], int | None, str]:
    """Example inputs, the sequence length, and the kind of model."""
    main = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    if main == "pixel_values":
        if seq is not None:
            raise UsageError(f"{name} reads images: --seq does not apply")
        kwargs: dict[str, Any] = {main: torch.randn(batch, *_image(config), generator=generator, dtype=dtype)}
        kind = "image"
    elif main == "input_ids":
        text = config.get_text_config()
        seq = seq if seq is not None else min(DEFAULT_SEQ, _positions(text) or DEFAULT_SEQ)
        _check_positions(model, text, name, seq)
        kwargs = {main: torch.randint(0, text.vocab_size, (batch, seq), generator=generator)}
        kind = "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "language"
    else:
        raise UsageError(f"{name} reads {main}; write a function that builds its inputs and give file.py:function")
    if "labels" in accepted:
        kwargs["labels"] = _labels(type(model).__name__, config, kwargs[main], generator)
    elif kind == "encoder-decoder":
        kwargs["decoder_input_ids"] = kwargs[main].clone()
    return {k: v.to(device) for k, v in kwargs.items()}, seq, kind


def _positions(config: Any) -> int | None:
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _check_positions(model: nn.Module, config: Any, name: str, seq: int) -> None:
    """A table of learned positions cannot be exceeded (computed positions can)."""
    positions = _positions(config)
    if positions is None or seq <= positions:
        return
    if any(isinstance(m, nn.Embedding) and positions <= m.num_embeddings <= positions + 2 for m in model.modules()):
        raise UsageError(f"{name} has {positions} learned positions; --seq {seq} exceeds them")


def _image(config: Any) -> tuple[int, int, int]:
    """(channels, height, width)."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE_SIZE
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return getattr(vision, "num_channels", 3), height, width


def _labels(cls: str, config: Any, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels by the task in the class name: a class per sample or token, else the tokens themselves."""
    classes = max(1, getattr(config, "num_labels", 2))
    if re.search(r"(Sequence|Image)Classification|WithTeacher", cls):
        return torch.randint(0, classes, inputs.shape[:1], generator=generator)
    if "TokenClassification" in cls:
        return torch.randint(0, classes, inputs.shape, generator=generator)
    if re.search(
        r"NextSentence|MultipleChoice|QuestionAnswering|Segmentation|ObjectDetection|MaskedImage|DepthEstimation", cls
    ):
        raise UsageError(
            f"example inputs of {cls} are not known; write a function that builds them and give file.py:function"
        )
    return inputs.clone()


def _from_function(
    name: str, file: str, function: str, *, batch: int, seq: int | None, device: str, seed: int, dtype: torch.dtype
) -> Loaded:
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"no such file: {file}")
    make = _import(path, function)
    given = _arguments(make, name, batch, seq)
    try:
        made = _call(make, name, given, device, seed, dtype)
    except UsageError:
        if device != "meta":
            raise
        made = _call(make, name, given, "cpu", seed, dtype)  # some models need values while they are built
    model, args, kwargs = _unpack(made, name)
    source = Source("function", name, batch, seq, file=file, function=function, sha256=_digest(path), seed=seed)
    return Loaded(model, args, kwargs, source, batch, seq, "function")


def _import(path: Path, function: str) -> Callable[..., Any]:
    """The function of a file, imported as a module of its own name with its folder on the path."""
    spec = importlib.util.spec_from_file_location(f"shardwright_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up
    sys.path.insert(0, folder)
    try:
        with _clear(f"importing {path}"):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    found = getattr(module, function, None)
    if not callable(found):
        public = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == spec.name]
        raise UsageError(f"{path} has no function {function!r}; it has {', '.join(public) or 'none'}")
    return found  # type: ignore[no-any-return]


def _arguments(make: Callable[..., Any], name: str, batch: int, seq: int | None) -> dict[str, int]:
    """`batch` and `seq` as far as the function takes them."""
    parameters = inspect.signature(make).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {"batch": batch} if any_name or "batch" in parameters else {}
    if seq is not None:
        if not any_name and "seq" not in parameters:
            raise UsageError(f"{name} takes no seq: --seq does not apply")
        given["seq"] = seq
    elif "seq" in parameters and parameters["seq"].default is inspect.Parameter.empty:
        given["seq"] = DEFAULT_SEQ
    missing = [
        p.name for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
    ]  # fmt: skip
    if missing:
        raise UsageError(f"{name} needs {', '.join(missing)}; a model function takes batch and seq")
    return given


def _call(
    make: Callable[..., Any], name: str, given: dict[str, int], device: str, seed: int, dtype: torch.dtype
) -> Any:
    with _seeded(seed, device, dtype), _clear(name):
        return make(**given)


def _unpack(made: Any, name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    wrong = f"{name} must return (model, inputs): a module, and a dict, a tuple or one tensor; it returned {type(made).__name__}"
    if not isinstance(made, tuple | list) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise UsageError(wrong)
    model, inputs = made
    if isinstance(inputs, torch.Tensor):
        return model, (inputs,), {}
    if isinstance(inputs, tuple | list):
        return model, tuple(inputs), {}
    if not hasattr(inputs, "keys"):
        raise UsageError(wrong)
    return model, (), dict(inputs)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _seeded(seed: int, device: str, dtype: torch.dtype) -> Iterator[None]:
    """New tensors on `device` in `dtype`, random ones from `seed`; torch's own state is restored."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def _clear(what: str) -> Iterator[None]:
    """Turn whatever user code raises into one UsageError with the user's line."""
    try:
        yield
    except Exception as error:
        line = user_line(traceback.extract_tb(error.__traceback__))
        raise UsageError(f"{what} failed: {type(error).__name__}: {error} at {line}") from error
