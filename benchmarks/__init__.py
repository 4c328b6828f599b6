# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Speed, exactness and memory, against mergekit's own `nuslerp`.

`python -m benchmarks` prints Markdown tables. Needs mergekit 0.1.5.
"""
