# SPDX-License-Identifier: Apache-2.0
"""Examples of networks with their data and losses, and what makes a task of them."""
