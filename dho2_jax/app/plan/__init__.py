# SPDX-License-Identifier: Apache-2.0
"""What a run will need of machines that need not be there."""
