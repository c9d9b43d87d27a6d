# SPDX-License-Identifier: Apache-2.0
"""What is written, printed and drawn, and what is read back from disk."""
