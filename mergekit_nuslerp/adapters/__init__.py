# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""One module for each of mergekit's merge-method interfaces."""

import importlib

# Importing the registry installs the plugin, which imports an adapter. So that none of
# them is still being imported then, the registry comes first.
importlib.import_module("mergekit.merge_methods")
