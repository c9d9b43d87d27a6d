# SPDX-License-Identifier: Apache-2.0
"""One step, from its algebra to what is settled."""
