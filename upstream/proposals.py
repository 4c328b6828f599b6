# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The proposals in their order, each without need of the later ones."""

from __future__ import annotations

from upstream.build import Proposal, append, body, edit, edit_docs, replace

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
    shares = normalize_weights(torch.tensor([weights], dtype=torch.float64))

    def solve(grams, tolerance):
        given = shares.to(grams.device, grams.dtype)
        return mean_coefficients(grams, given, antipodal_tolerance=tolerance)

    sizes = vector_view(tensors[0].shape, flatten, row_wise)
    return merge_vectors(tensors, base, sizes, solve)
''',
        ),
        body(
            _NUSLERP,
            "nuslerp_merge_method",
            """\
    if not group.tensors[0].is_floating_point():
        raise TypeError("NuSLERP requires floating-point tensors")
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
    ],
)

PROPOSALS = [ROW_WISE, LAST_SLICE, ENTRY_POINTS, EXACT]
