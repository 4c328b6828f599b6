# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Changes of mergekit that its maintainer can take one by one.

`python -m upstream OUT` writes them as patches for mergekit 0.1.5. Each has a text of
its own here, `NN-name.md`, and its new files under `files/NN`.
"""
