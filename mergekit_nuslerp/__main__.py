# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`python -m mergekit_nuslerp`: the command, where no script is installed for it."""

from mergekit_nuslerp.cli import main

if __name__ == "__main__":
    main(prog_name="mergekit-nuslerp")
