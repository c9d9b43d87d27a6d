# SPDX-License-Identifier: Apache-2.0
"""The ways to renew the subspace."""
