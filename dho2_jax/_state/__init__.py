# SPDX-License-Identifier: Apache-2.0
"""What is kept between steps, and how it is read and restored."""
