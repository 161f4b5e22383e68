"""Precision recipes and optimizers as data: which tensors exist per parameter element, and how many bytes each takes.

    recipe        compute   parameter  gradient  master  moments   bytes per element with Adam
    megatron      bf16      bf16 2     fp32 4    fp32 4  fp32 8    18
    zero          bf16      bf16 2     bf16 2    fp32 4  fp32 8    16
    zero-fp16     fp16      fp16 2     fp16 2    fp32 4  fp32 8    16
    fsdp-fp32     bf16      fp32 4     fp32 4    -       fp32 8    16 (sharded) and a bf16 copy while gathered
    fsdp-bf16     bf16      fp32 4     fp32 4    -       fp32 8    as fsdp-fp32, with gradients summed over ranks in bf16
    fp16          fp16      fp32 4     fp32 4    -       fp32 8    16 and an fp16 copy while gathered
    fp32          fp32      fp32 4     fp32 4    -       fp32 8    16
    fp64          fp64      fp64 8     fp64 8    -       fp64 16   32
    pure-bf16     bf16      bf16 2     bf16 2    -       bf16 4    8
    pure-fp16     fp16      fp16 2     fp16 2    -       fp16 4    8
    megatron-fp8  bf16      bf16 2     fp32 4    fp32 4  fp32 8    18; products with parameters in fp8
    fsdp-fp8      bf16      fp32 4     fp32 4    -       fp32 8    16; likewise

Gradients are summed over ranks as they come where parameters are computed with as stored, else in the gradient's dtype, unless a
recipe says otherwise. The runtime executes recipes without a master copy; the others price what somebody else runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import PinError
from .cluster import Device
from .outline import DTYPE_BYTES
from .plan import Precision

DTYPES: Mapping[str, str] = MappingProxyType(
    {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
)
"""Spelling of the `dtype=` pin -> dtype."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Dtypes of everything kept per parameter element; `master` is the dtype of an extra copy for the optimizer, or "".

    `runs` says whether the runtime executes it. `products` is the dtype of products with parameters, "" for `compute`.
    `reduction` is the dtype in which gradients are summed over ranks, where it is neither the gradient's nor the one they come in.
    """

    name: str
    compute: str
    parameter: str
    gradient: str
    moment: str
    master: str = ""
    runs: bool = True
    products: str = ""
    reduction: str = ""

    def precision(self) -> Precision:
        """What a plan records."""
        return Precision(self.name, self.compute, self.parameter, self.gradient, self.moment)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        r.name: r
        for r in (
            Recipe("megatron", "bfloat16", "bfloat16", "float32", "float32", "float32", runs=False),
            Recipe("megatron-fp8", "bfloat16", "bfloat16", "float32", "float32", "float32", False, "float8_e4m3fn"),
            Recipe(
                "fsdp-fp8",
                "bfloat16",
                "float32",
                "float32",
                "float32",
                runs=False,
                products="float8_e4m3fn",
                reduction="bfloat16",
            ),
            Recipe("zero", "bfloat16", "bfloat16", "bfloat16", "float32", "float32", runs=False),
            Recipe("zero-fp16", "float16", "float16", "float16", "float32", "float32", runs=False),
            Recipe("fsdp-fp32", "bfloat16", "float32", "float32", "float32"),
            Recipe("fsdp-bf16", "bfloat16", "float32", "float32", "float32", reduction="bfloat16"),
            Recipe("fp16", "float16", "float32", "float32", "float32"),
            Recipe("fp32", "float32", "float32", "float32", "float32"),
            Recipe("fp64", "float64", "float64", "float64", "float64"),
            Recipe("pure-bf16", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
            Recipe("pure-fp16", "float16", "float16", "float16", "float16"),
        )
    }
)

_BY_DTYPE: Mapping[str, str] = MappingProxyType(
    {"bfloat16": "fsdp-fp32", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
)
_BY_MODEL: Mapping[str, str] = MappingProxyType({**_BY_DTYPE, "bfloat16": "pure-bf16", "float16": "pure-fp16"})


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What one optimizer keeps and touches, in tensors of a parameter's size.

    `moments` live between steps; `scalars` are 0-dim float32 tensors per parameter. A step makes `temporaries` tensors of the
    size of one parameter when it goes parameter by parameter, one of all of them when it goes over all at once (`foreach`), and
    none as one kernel (`FUSED`).
    """

    name: str
    moments: int
    temporaries: int = 1
    scalars: int = 0


OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        o.name: o
        for o in (
            Optimizer("sgd", 0),
            Optimizer("sgd+momentum", 1),
            Optimizer("adam", 2, temporaries=2, scalars=1),
            Optimizer("adamw", 2, temporaries=2, scalars=1),
            Optimizer("nadam", 2, temporaries=2, scalars=2),
            Optimizer("radam", 2, temporaries=2, scalars=1),
            Optimizer("adamax", 2, temporaries=2, scalars=1),
            Optimizer("adadelta", 2, temporaries=2, scalars=1),
            Optimizer("rprop", 2, temporaries=2, scalars=1),
            Optimizer("lion", 1, temporaries=2),
            Optimizer("adagrad", 1, temporaries=2, scalars=1),
            Optimizer("rmsprop", 1, temporaries=2, scalars=1),
            Optimizer("asgd", 1, temporaries=1, scalars=3),
        )
    }
)
"""Element-wise optimizers: each element's update depends on that element alone, so a shard is updated exactly."""

_FULL = frozenset({"float32", "float64"})
_ALL = _FULL | {"bfloat16", "float16"}

FUSED: Mapping[tuple[str, str], frozenset[str]] = MappingProxyType(
    {
        ("adam", "cpu"): _ALL, ("adam", "gpu"): _ALL, ("adamw", "cpu"): _ALL, ("adamw", "gpu"): _ALL,
        ("sgd", "cpu"): _FULL, ("sgd", "gpu"): _ALL, ("sgd+momentum", "cpu"): _FULL, ("sgd+momentum", "gpu"): _ALL,
        ("adagrad", "cpu"): _ALL,
    }
)  # fmt: skip
"""(optimizer, kind of device) -> dtypes of parameters that torch updates in one kernel (`fused=True`), which makes no temporaries.

SGD of half precision on CPUs is left out: its vectorised kernel misses the update (torch 2.13: 32 elements and more of bfloat16 or
float16 are off by the step itself).
"""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "muon": "it orthogonalises whole matrices",
        "adafactor": "it keeps row and column means of whole matrices",
        "lbfgs": "it takes inner products over all parameters and calls the model several times a step",
        "lamb": "it scales by the norm of whole parameters",
        "lars": "it scales by the norm of whole parameters",
        "shampoo": "it preconditions whole matrices",
        "soap": "it preconditions whole matrices",
        "sparseadam": "it needs sparse gradients",
    }
)
"""Optimizers that look at whole parameters, and why their shards would not be exact."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes per parameter element, by cause. `copy` is the compute copy, 0 when parameters compute as stored."""

    parameter: int
    gradient: int
    master: int
    moments: int
    copy: int

    @property
    def total(self) -> int:
        """All that lives between steps; the compute copy is transient and not in it."""
        return self.parameter + self.gradient + self.master + self.moments


def state_bytes(precision: Precision, optimizer: str) -> StateBytes:
    """Bytes per trainable parameter element under a recipe and an optimizer."""
    recipe = RECIPES.get(precision.recipe)
    master = DTYPE_BYTES[recipe.master] if recipe is not None and recipe.master else 0
    moments = find_optimizer(optimizer).moments * DTYPE_BYTES[precision.moment]
    copy = DTYPE_BYTES[precision.compute] if precision.compute != precision.parameter else 0
    return StateBytes(DTYPE_BYTES[precision.parameter], DTYPE_BYTES[precision.gradient], master, moments, copy)


def sum_dtype(precision: Precision) -> str:
    """The dtype in which gradients are summed over ranks."""
    recipe = RECIPES.get(precision.recipe)
    if recipe is not None and recipe.reduction:
        return recipe.reduction
    return precision.compute if precision.compute == precision.parameter else precision.gradient


def sum_ratio(precision: Precision) -> float:
    """Bytes of a gradient as it is summed over those in the compute dtype."""
    return DTYPE_BYTES[sum_dtype(precision)] / DTYPE_BYTES[precision.compute]


def semantics_of(precision: Precision) -> str:
    """EXACT relative to the stated dtypes, LOSSY where products run in fewer bits than they are computed in."""
    recipe = RECIPES.get(precision.recipe)
    return "LOSSY" if recipe is not None and recipe.products else "EXACT"


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`; raises PinError with the nearest names."""
    if name in RECIPES:
        return RECIPES[name]
    raise PinError(f"precision={name}: no such recipe{_nearest(name, RECIPES)}")


def find_optimizer(name: str) -> Optimizer:
    """The optimizer called `name` (case does not matter); raises PinError for refused and unknown ones."""
    key = name.lower().replace("-", "+") if name.lower().startswith("sgd") else name.lower()
    if key in OPTIMIZERS:
        return OPTIMIZERS[key]
    if key in REFUSED:
        raise PinError(
            f"optimizer={name} is not supported: {REFUSED[key]}; element-wise ones are: {', '.join(OPTIMIZERS)}"
        )
    raise PinError(f"optimizer={name}: not known{_nearest(key, OPTIMIZERS)}")


def fused(optimizer: str, kind: str, dtype: str) -> bool:
    """Whether steps over parameters of `dtype` on a kind of device ("cpu", "gpu") are one kernel: plans and runs agree on it."""
    return dtype in FUSED.get((optimizer, kind), ())


def choose_precision(device: Device, *, recipe: str | None = None, dtype: str | None = None) -> Precision:
    """The precision that pins and device ask for; by default bf16 (else fp16) compute on GPUs, fp32 on CPU.

    `recipe` is the `precision=` pin, `dtype` the `dtype=` pin ("bf16", "fp32", ...). Raises PinError when they contradict
    each other or the device has no arithmetic of that dtype.
    """
    wanted = find_recipe(recipe) if recipe is not None else None
    if dtype is not None and dtype not in DTYPES:
        raise PinError(f"dtype={dtype}: not known; use one of {', '.join(DTYPES)}")
    if wanted is None:
        wanted = RECIPES[_BY_DTYPE[DTYPES[dtype]]] if dtype is not None else _default(device)
    elif dtype is not None and wanted.compute != DTYPES[dtype]:
        raise PinError(
            f"dtype={dtype} contradicts precision={recipe}, which computes in {wanted.compute}; drop one of them"
        )
    if wanted.compute not in device.peak_flops:
        have = [short for short, long in DTYPES.items() if long in device.peak_flops]
        raise PinError(f"{device.name} does not compute in {wanted.compute}; use dtype={'|'.join(have)}")
    return wanted.precision()


def model_precision(dtype: str) -> Precision:
    """The precision of a model as it stands: its own dtype for parameters, gradients and moments."""
    if dtype not in _BY_MODEL:
        raise PinError(f"models of dtype {dtype} are not supported; use one of {', '.join(_BY_MODEL)}")
    return RECIPES[_BY_MODEL[dtype]].precision()


def inference_precision(precision: Precision, recipe: str | None) -> Precision:
    """The precision of inference: parameters are kept in the compute dtype, unless a recipe is pinned."""
    return precision if recipe is not None else model_precision(precision.compute)


def _default(device: Device) -> Recipe:
    if device.kind == "cpu":
        return RECIPES["fp32"]
    return next((RECIPES[_BY_DTYPE[d]] for d in ("bfloat16", "float16") if d in device.peak_flops), RECIPES["fp32"])


def _nearest(name: str, table: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(table)}"
