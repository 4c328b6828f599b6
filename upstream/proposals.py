# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The proposals in their order, each without need of the later ones."""

from __future__ import annotations

from upstream.build import Proposal, append, body, cut, edit, edit_docs, replace

_METHODS = "mergekit/merge_methods/"
_NUSLERP = f"{_METHODS}nuslerp.py"
_KARCHER = f"{_METHODS}karcher.py"
_SPHERICAL = f"{_METHODS}spherical.py"
_REGISTRY = f"{_METHODS}registry.py"
_GUIDE = "docs/merge_methods.md"

ROW_WISE = Proposal(
    1,
    [
        edit(
            _NUSLERP,
            "    nuslerp_row_wise: bool = False,\n",
            "    # True: vectors run along dimension 0, and are columns W[:, j] of a\n"
            "    # matrix. False: they run along the last one, and are rows W[i, :].\n"
            "    nuslerp_row_wise: bool = False,\n",
            within="nuslerp_merge_method",
        ),
        edit_docs(
            _GUIDE,
            "`false`, performs row/column-wise interpolation. Default `true`",
            "`false`, interpolates each row or column on its own. Default `true`",
        ),
        edit_docs(
            _GUIDE,
            "SLERPs row vectors instead of column vectors. Default `false`",
            "the vectors run along the first dimension and are columns `W[:, j]` of a "
            "matrix. If `false`, they run along the last and are rows `W[i, :]`. "
            "Default `false`",
        ),
    ],
)

LAST_SLICE = Proposal(
    2,
    [
        edit(
            "mergekit/plan.py",
            "[weight_info] * len(definition.slices[0].sources),\n"
            "                [s.model for s in definition.slices[-1].sources],\n",
            "[weight_info] * len(definition.slices[-1].sources),\n"
            "                [s.model for s in definition.slices[-1].sources],\n",
            within="MergePlanner.plan_module",
        )
    ],
)

ENTRY_POINTS = Proposal(
    3,
    [
        edit(
            _REGISTRY,
            "from typing import Dict, Tuple\n",
            "from importlib.metadata import entry_points\n"
            "from typing import Dict, Tuple\n",
        ),
        edit(
            _REGISTRY,
            "_METHODS: Dict[str, MergeMethod] = {}\n",
            "_METHODS: Dict[str, MergeMethod] = {}\n"
            "\n"
            "# Where other packages name their methods, `NAME = module:method`.\n"
            '_ENTRY_POINT_GROUP = "mergekit.merge_methods"\n',
        ),
        edit(
            _REGISTRY,
            "    try:\n",
            "    if name not in _METHODS:\n"
            "        _register_entry_point(name)\n"
            "    try:\n",
            within="get",
        ),
        edit(
            _REGISTRY,
            "def registered_methods() -> Tuple[MergeMethod, ...]:\n",
            '''\
def _register_entry_point(name: str) -> None:
    """Register the method that an installed package provides under this name."""
    found = tuple(entry_points(group=_ENTRY_POINT_GROUP, name=name))
    if not found:
        return
    origins = ", ".join(sorted(point.value for point in found))
    if len(found) > 1:
        raise RuntimeError(f"Several packages provide merge method {name}: {origins}")
    method = found[0].load()
    if not isinstance(method, MergeMethod) or method.spec.name != name:
        raise TypeError(f"Entry point {name} is not a merge method {name}: {origins}")
    if _METHODS.get(name) is not method:  # its module may have registered it
        register(method)


def registered_methods() -> Tuple[MergeMethod, ...]:
''',
        ),
        edit(
            "README.md",
            "for custom methods and batching.\n",
            """\
for custom methods and batching.

A package can provide a merge method for configs to name, without being imported first:

```toml
[project.entry-points."mergekit.merge_methods"]
my_method = "my_package:my_method"
```

The entry point leads to what `register` takes, and has the method's name. Methods that
are registered already come first, so built-in ones cannot be replaced.
""",
        ),
        edit_docs(
            "docs/create_a_merge_method.md",
            "## Decorator API Implementation\n",
            """\
### Methods in Packages of Their Own

An installed package can provide a method by an entry point with the method's name, in
the group `mergekit.merge_methods`. It leads to what `register` takes.

## Decorator API Implementation
""",
        ),
    ],
)

# In `mean_coefficients`, of two vectors and of any number of them.
_SLERP_ALONE = "    directions, unique = _slerp(cosines, weights, bound)\n"
_CHOICE = (
    "    mean = _slerp if len(gram) == 2 else karcher_coefficients\n"
    "    directions, unique = mean(cosines, weights, bound)\n"
)

EXACT = Proposal(
    4,
    [
        edit(
            _NUSLERP,
            "import torch\n",
            "import math\n"
            "from typing import Optional, Sequence, Tuple\n"
            "\n"
            "import torch\n",
        ),
        edit(
            _NUSLERP,
            "from mergekit.merge_methods.easy_define import merge_method\n",
            "from mergekit.merge_methods.easy_define import merge_method\n"
            "from mergekit.merge_methods.spherical import (\n"
            "    mean_coefficients,\n"
            "    merge_vectors,\n"
            "    normalize_weights,\n"
            ")\n",
        ),
        replace(
            _NUSLERP,
            "nuslerp",
            '''\
def vector_view(
    shape: Sequence[int], flatten: bool, row_wise: bool
) -> Tuple[int, int, int, int]:
    """Sizes (outer, length, inner, width) of the view that `merge_vectors` takes."""
    *leading, width = shape or (1,)
    if flatten or not leading:
        return 1, math.prod(leading), 1, width
    if row_wise:
        return 1, shape[0], math.prod(shape[1:]), 1
    return math.prod(leading), 1, 1, width


def nuslerp(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: Optional[torch.Tensor] = None,
    *,
    flatten: bool = True,
    row_wise: bool = False,
) -> torch.Tensor:
    """SLERP of two tensors, or of their differences from a base.

    Weights are relative, and equal where they sum to almost zero. Opposite vectors,
    which have no unique mean, are interpolated linearly.
    """
    shares = normalize_weights(torch.tensor(weights, dtype=torch.float64))

    def solve(gram, bound):
        given = shares.to(gram)[:, None, None].repeat(1, *gram.shape[2:])
        return mean_coefficients(gram, given, bound)

    sizes = vector_view(tensors[0].shape, flatten, row_wise)
    return merge_vectors(tensors, base, sizes, solve)
''',
        ),
        body(
            _NUSLERP,
            "nuslerp_merge_method",
            """\
    entries = group.non_base
    return nuslerp(
        [entry.tensor for entry in entries],
        weight.values_for(entries),
        base=group.base.tensor if group.base else None,
        flatten=nuslerp_flatten,
        row_wise=nuslerp_row_wise,
    )
""",
        ),
        # What 5 and 8 add to the function.
        edit(
            _SPHERICAL,
            "weights: torch.Tensor, magnitude: Magnitude, bound: float\n",
            "weights: torch.Tensor, bound: float\n",
            within="mean_coefficients",
        ),
        edit(_SPHERICAL, _CHOICE, _SLERP_ALONE, within="mean_coefficients"),
        cut(
            _SPHERICAL,
            "    if magnitude !=",
            "    # NaN and infinity",
            within="mean_coefficients",
        ),
    ],
)

MANY = Proposal(
    5,
    [
        edit(
            _SPHERICAL,
            "\n\ndef merge_vectors(",
            "# take geometry: _MAX_STEPS\n\n\ndef merge_vectors(",
        ),
        edit(_SPHERICAL, _SLERP_ALONE, _CHOICE, within="mean_coefficients"),
        append(
            _SPHERICAL,
            "# take geometry: karcher_coefficients, _log_maps, _FirstOrder\n",
        ),
        edit(
            _NUSLERP,
            '''\
    """SLERP of two tensors, or of their differences from a base.

    Weights are relative, and equal where they sum to almost zero. Opposite vectors,
    which have no unique mean, are interpolated linearly.
''',
            '''\
    """Spherical mean of tensors, or of their differences from a base.

    Two are interpolated along a great circle, more are merged into their Karcher mean.
    Weights are relative, and equal where they sum to almost zero. Vectors without a
    unique mean, and all of more than two where two are opposite, are merged linearly.
    Derivatives of more than two are of first order and in reverse mode only.
''',
            within="nuslerp",
        ),
        edit(
            _NUSLERP,
            "\n    def solve(",
            """\
    if len(tensors) > 2 and min(weights) < 0:
        raise ValueError(f"Weights of more than two inputs are negative: {weights}")

    def solve(""",
            within="nuslerp",
        ),
        edit(
            _NUSLERP,
            "    contract=InputContract(\n"
            "        base=BasePolicy.OPTIONAL,\n"
            "        min_non_base=2,\n"
            "        max_non_base=2,\n"
            "    ),\n",
            "    contract=InputContract(base=BasePolicy.OPTIONAL, min_non_base=2),\n",
        ),
        edit(
            _KARCHER,
            "from mergekit.merge_methods.easy_define import merge_method\n",
            """\
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.spherical import (
    karcher_coefficients,
    merge_vectors,
    normalize_weights,
)
""",
        ),
        replace(
            _KARCHER,
            "karcher_merge_tensors",
            '''\
def karcher_merge_tensors(tensors, alphas, *, tol=1e-5):
    """Compute a weighted Karcher mean on the unit hypersphere.

    No weight is negative. Derivatives are of first order and in reverse mode only.
    """
    if len(tensors) == 1:
        return tensors[0]
    alphas = torch.tensor(alphas, dtype=torch.float64)

    def solve(gram, bound):
        gram = gram[..., 0, 0]  # of the only vector
        weights, squares = alphas.to(gram), gram.diagonal()
        # Inputs shorter than tol have no direction, and no share in the mean.
        short = squares <= tol**2
        norms = torch.where(short, 1, squares).sqrt()
        identity = torch.eye(len(tensors)).to(gram)
        cosines = gram / norms / norms.unsqueeze(1)
        cosines = torch.where(short | short.unsqueeze(1), identity, cosines)
        shares = normalize_weights(torch.where(short, 0, weights))
        directions, unique = karcher_coefficients(cosines, shares, bound)
        if not unique:
            # Take the direction of the weighted sum or, where inputs cancel, that of
            # the first one.
            square = (shares * cosines * shares.unsqueeze(1)).sum()
            directions = identity[(~short).int().argmax()]
            if square > tol**2:
                directions = shares / square.sqrt()
        kept = torch.where(short, 0, weights * norms).sum() * directions / norms
        return torch.where(short, 0, kept)[:, None, None], unique

    return merge_vectors(tensors, None, (1, 1, 1, tensors[0].numel()), solve)
''',
        ),
        edit(
            _KARCHER,
            "    max_iter: int = 10,\n",
            "    # Newton's method needs no bound. Configs may have this one.\n"
            "    max_iter: int = 10,\n",
            within="karcher_merge_method",
        ),
        edit(
            _KARCHER,
            "alphas, max_iter=max_iter, tol=tol)",
            "alphas, tol=tol)",
            within="karcher_merge_method",
        ),
        edit(
            "README.md",
            "|     2    |  *   | More intuitive SLERP;",
            "|    ≥2    |  *   | More intuitive SLERP;",
        ),
        edit_docs(
            _GUIDE,
            "Relative weighting for each of the two main models. These are used",
            "Relative weighting for each of the main models. None of more than two may "
            "be negative. Of two, they are used",
        ),
        edit_docs(
            _GUIDE,
            "- `tol` (global): Convergence tolerance. Default",
            "- `tol` (global): Length up to which an input, or the sum of inputs that "
            "cancel, has no direction. Default",
        ),
        edit_docs(
            _GUIDE,
            "Maximum iterations for the Karcher mean algorithm. Default `10`",
            "Has no effect; older configs may set it. Default `10`",
        ),
        edit_docs(
            _GUIDE,
            "**Inputs:** Requires exactly 2 models. A `base_model` can optionally be "
            "provided (it must be distinct from the two main models).",
            "**Inputs:** Requires 2 or more models; more than 2 are merged into their "
            "weighted Karcher mean. A `base_model` can optionally be provided (it must "
            "be distinct from the main models).",
        ),
    ],
)

_GENOME = "mergekit/evo/genome.py"
_LEGACY = "mergekit/scripts/legacy.py"
_RESOLVER = "mergekit/parameter_resolver.py"
_PLAN = "mergekit/plan.py"

ERRORS = Proposal(
    6,
    [
        edit(
            _RESOLVER,
            "from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple\n",
            "from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, "
            "Tuple\n\nfrom pydantic import ValidationError\n",
        ),
        edit(
            _RESOLVER,
            """\
            value = evaluate_setting(
                tensor_name, scope[parameter.name], t, validate=parameter.validate
            )
            if value is not None:
                return value
    if parameter.required:
        location = f"{model}.{tensor_name}" if model is not None else tensor_name
""",
            """\
            try:
                value = evaluate_setting(
                    tensor_name, scope[parameter.name], t, validate=parameter.validate
                )
            except ValidationError as error:
                reason = error.errors()[0]
                raise ValueError(
                    f"Invalid value {reason['input']!r} of parameter {parameter.name} "
                    f"for {location}: {reason['msg']}"
                ) from error
            if value is not None:
                return value
    if parameter.required:
""",
            within="resolve_parameter",
        ),
        edit(
            _RESOLVER,
            "    for scope in settings:\n",
            '    location = f"{model}.{tensor_name}" if model is not None else '
            "tensor_name\n"
            "    for scope in settings:\n",
            within="resolve_parameter",
        ),
        append(
            _RESOLVER,
            '''\
def unread_parameters(
    spec: MergeMethodSpec,
    shared: Iterable[Settings],
    per_input: Iterable[Tuple[ModelReference, Settings]],
) -> List[str]:
    """Describe configured parameters that the merge method does not read."""
    inputs = {p.name for p in spec.input_parameters}
    known = inputs | {p.name for p in spec.shared_parameters}
    found = [name for settings in shared for name in set(settings or ()) - known]
    for model, settings in per_input:
        found += [f"{name} of model {model}" for name in set(settings or ()) - inputs]
    return sorted(set(found))
''',
        ),
        edit(
            _PLAN,
            "from mergekit.parameter_resolver import resolve_parameters\n",
            "from mergekit.parameter_resolver import resolve_parameters, "
            "unread_parameters\n",
        ),
        edit(
            _PLAN,
            "        self.normalize_config()\n",
            "        self.normalize_config()\n        self._warn_unread_parameters()\n",
            within="MergePlanner._plan",
        ),
        edit(
            _PLAN,
            "    def plan_tensor(\n",
            '''\
    def _warn_unread_parameters(self):
        """Name settings without effect, such as misspelt ones."""
        modules = self.config.modules.values()
        slices = [out_slice for module in modules for out_slice in module.slices]
        for name in unread_parameters(
            self._method.spec,
            [part.parameters for part in (self.config, *modules, *slices)],
            [(source.model, source.parameters) for s in slices for source in s.sources],
        ):
            logging.warning(
                f"Merge method {self._method.spec.name} does not read parameter {name}"
            )

    def plan_tensor(
''',
        ),
        # What mergekit's own commands write and their method does not read.
        edit(
            _GENOME,
            "from mergekit.common import ModelReference\n",
            "from mergekit import merge_methods\n"
            "from mergekit.common import ModelReference\n",
        ),
        edit(
            _GENOME,
            "        return MergeConfiguration.model_validate(\n",
            """\
        parameters = {"normalize": normalize, "int8_mask": True}
        spec = merge_methods.get(self.definition.merge_method).spec
        known = {p.name for p in spec.shared_parameters}
        return MergeConfiguration.model_validate(
""",
            within="ModelGenome.genotype_merge_config",
        ),
        edit(
            _GENOME,
            """\
                "parameters": {
                    "normalize": normalize,
                    "int8_mask": True,
                },
""",
            """\
                "parameters": {k: v for k, v in parameters.items() if k in known},
""",
            within="ModelGenome.genotype_merge_config",
        ),
        edit(
            _GENOME,
            """\
            if self.definition.tokenizer_source:
                s["sources"][0]["parameters"] = {"weight": 1 - t}
                s["sources"][1]["parameters"] = {"weight": t}
""",
            "",
            within="ModelGenome._slerp_slices",
        ),
        edit(
            _LEGACY,
            "from mergekit.config import InputModelDefinition",
            "from mergekit import merge_methods\n"
            "from mergekit.config import InputModelDefinition",
        ),
        edit(
            _LEGACY,
            '    parameters["normalize"] = normalize\n',
            """\
    spec = merge_methods.get(method).spec
    if "normalize" in {p.name for p in spec.shared_parameters}:
        parameters["normalize"] = normalize
""",
            within="main",
        ),
    ],
)

GRANULARITY = Proposal(
    7,
    [
        edit(
            _NUSLERP,
            "import torch\n",
            "import torch\n"
            "from pydantic import Field\n"
            "from typing_extensions import Annotated\n",
        ),
        edit(
            _NUSLERP,
            "\n\ndef vector_view(",
            """
Granularity = Annotated[
    str, Field(pattern=r"^(tensor|matrix|(row|column)(:[1-9][0-9]*)?)$")
]


def vector_view(""",
        ),
        replace(
            _NUSLERP,
            "vector_view",
            '''\
def vector_view(shape: Sequence[int], granularity: str) -> Tuple[int, int, int, int]:
    """Sizes (outer, length, inner, width) of the view that `merge_vectors` takes.

    A vector is the whole tensor, each matrix (the last two dimensions), each row or
    column of one, N neighbours of these for "row:N" and "column:N", or each run along
    the first dimension for "dim0". Tensors of fewer than two dimensions are one vector.
    """
    kind, _, block = granularity.partition(":")
    *leading, rows, columns = (1, 1, *shape)
    matrices = math.prod(leading)
    if kind == "tensor" or len(shape) < 2:
        return 1, matrices * rows, 1, columns
    if kind == "dim0":
        return 1, shape[0], math.prod(shape[1:]), 1
    if kind == "matrix":
        return matrices, rows, 1, columns
    size, count = (rows if kind == "row" else columns), int(block or 1)
    if size % count:
        raise ValueError(f"granularity {granularity} does not divide {size} {kind}s")
    if kind == "row":
        return matrices * (rows // count), count, 1, columns
    return matrices, rows, columns // count, count
''',
        ),
        edit(
            _NUSLERP,
            "    flatten: bool = True,\n    row_wise: bool = False,\n",
            '    granularity: str = "tensor",\n',
            within="nuslerp",
        ),
        edit(
            _NUSLERP,
            "vector_view(tensors[0].shape, flatten, row_wise)",
            "vector_view(tensors[0].shape, granularity)",
            within="nuslerp",
        ),
        edit(
            _NUSLERP,
            "    nuslerp_flatten: bool = True,\n",
            "    nuslerp_flatten: bool = True,\n"
            "    # Comes before both flags.\n"
            "    nuslerp_granularity: Optional[Granularity] = None,\n",
            within="nuslerp_merge_method",
        ),
        edit(
            _NUSLERP,
            "        flatten=nuslerp_flatten,\n        row_wise=nuslerp_row_wise,\n",
            "        granularity=nuslerp_granularity or flags,\n",
            within="nuslerp_merge_method",
        ),
        edit(
            _NUSLERP,
            "    entries = group.non_base\n",
            """\
    flags = "dim0" if nuslerp_row_wise else "row"
    if nuslerp_flatten:
        flags = "tensor"
    entries = group.non_base
""",
            within="nuslerp_merge_method",
        ),
        edit_docs(
            _GUIDE,
            "- `nuslerp_flatten` (global)",
            "- `nuslerp_granularity` (global): What forms one vector on the sphere: "
            "`tensor`, `matrix`, `row`, `column`, or `row:N` and `column:N` for N of "
            "them. Comes before `nuslerp_flatten` and `nuslerp_row_wise`. Not set by "
            "default\n"
            "- `nuslerp_flatten` (global)",
        ),
    ],
)

_EASY = f"{_METHODS}easy_define.py"

MAGNITUDE = Proposal(
    8,
    [
        edit(_EASY, "import inspect\n", "import inspect\nimport keyword\n"),
        edit(
            _EASY,
            "def _parameter_spec(\n",
            '''\
def _parameter_name(argument: str) -> str:
    """The name of a parameter: its argument's, but `lambda` for `lambda_`."""
    name = argument.removesuffix("_")
    return name if keyword.iskeyword(name) else argument


def _parameter_spec(
''',
        ),
        edit(
            _EASY,
            "        name=argument.name,\n",
            "        name=_parameter_name(argument.name),\n",
            within="_parameter_spec",
        ),
        edit(
            _EASY,
            "    Register the returned method explicitly",
            "    Arguments cannot be keywords of Python: `lambda_` is parameter `lambda`.\n"
            "    Register the returned method explicitly",
            within="merge_method",
        ),
        edit(
            _EASY,
            "    wrapper = BatchedMergeMethod if batched else FunctionalGroupMergeMethod\n"
            "    return wrapper(spec, func)\n",
            """\
    names = {_parameter_name(arg.name): arg.name for arg in arguments[1:]}
    kernel = func
    if any(name != argument for name, argument in names.items()):

        def kernel(inputs, /, **parameters):
            return func(inputs, **{names[name]: x for name, x in parameters.items()})

    wrapper = BatchedMergeMethod if batched else FunctionalGroupMergeMethod
    return wrapper(spec, kernel)
""",
            within="_method_from_function",
        ),
        edit(
            _SPHERICAL,
            "import torch\n",
            "import torch\nfrom typing_extensions import Literal\n",
        ),
        edit(
            _SPHERICAL,
            "\n\ndef merge_vectors(",
            "\n# take geometry: Magnitude\n\n\ndef merge_vectors(",
        ),
        replace(
            _SPHERICAL,
            "mean_coefficients",
            "# take geometry: _mean as mean_coefficients\n",
        ),
        edit(
            _NUSLERP,
            "spherical import (\n",
            "spherical import (\n    Magnitude,\n",
        ),
        edit(
            _NUSLERP,
            '    granularity: str = "tensor",\n',
            '    granularity: str = "tensor",\n'
            '    magnitude: Magnitude = "slerp",\n'
            "    lambda_: float = 1.0,\n",
            within="nuslerp",
        ),
        edit(
            _NUSLERP,
            "    shares = normalize_weights(",
            """\
    if base is None and lambda_ != 1:
        raise ValueError("lambda scales task vectors, and needs a base")
    shares = normalize_weights(""",
            within="nuslerp",
        ),
        edit(
            _NUSLERP,
            "        return mean_coefficients(gram, given, bound)\n",
            """\
        coefficients, unique = mean_coefficients(gram, given, magnitude, bound)
        return lambda_ * coefficients, unique
""",
            within="nuslerp",
        ),
        edit(
            _NUSLERP,
            "    nuslerp_granularity: Optional[Granularity] = None,\n",
            "    nuslerp_granularity: Optional[Granularity] = None,\n"
            "    # The length of the result: SLERP's formula, or a mean of the lengths.\n"
            '    nuslerp_magnitude: Magnitude = "slerp",\n'
            "    lambda_: float = 1.0,\n",
            within="nuslerp_merge_method",
        ),
        edit(
            _NUSLERP,
            "        granularity=nuslerp_granularity or flags,\n",
            "        granularity=nuslerp_granularity or flags,\n"
            "        magnitude=nuslerp_magnitude,\n"
            "        lambda_=lambda_,\n",
            within="nuslerp_merge_method",
        ),
        edit_docs(
            _GUIDE,
            "- `nuslerp_flatten` (global)",
            "- `nuslerp_magnitude` (global): Length of the result: `slerp` for its "
            "formula, `linear` or `geometric` for that mean of the lengths, but not "
            "below 0. Default `slerp`\n"
            "- `lambda` (global): Scales the merged task vector. Needs a `base_model`. "
            "Default 1.0\n"
            "- `nuslerp_flatten` (global)",
        ),
    ],
)

PROPOSALS = [
    ROW_WISE,
    LAST_SLICE,
    ENTRY_POINTS,
    EXACT,
    MANY,
    ERRORS,
    GRANULARITY,
    MAGNITUDE,
]
