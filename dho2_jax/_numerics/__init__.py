# SPDX-License-Identifier: Apache-2.0
"""The numerics, which know no device and no state."""
