# SPDX-License-Identifier: Apache-2.0
"""DHO²: distributed hybrid-order optimization as an Optax gradient transformation.

`dho2` makes the transformation; `refresh`, `subspace` and `metrics` read and renew its
curvature in any nest of Optax states.
"""

from dho2_jax._alias import dho2_adam as dho2_adam
from dho2_jax._alias import dho2_adamw as dho2_adamw
from dho2_jax._alias import dho2_heavy_ball as dho2_heavy_ball
from dho2_jax._alias import dho2_muon as dho2_muon
from dho2_jax._alias import dho2_nesterov as dho2_nesterov
from dho2_jax._alias import dho2_sgd as dho2_sgd
from dho2_jax._alias import fosi as fosi
from dho2_jax._numerics.chunks import chunked_value_fn as chunked_value_fn
from dho2_jax._numerics.lanczos import LanczosResult as LanczosResult
from dho2_jax._numerics.lanczos import lanczos_tridiag as lanczos_tridiag
from dho2_jax._numerics.operators import curvature_matvec as curvature_matvec
from dho2_jax._numerics.operators import ggn_vp as ggn_vp
from dho2_jax._numerics.operators import hvp as hvp
from dho2_jax._numerics.operators import (
    hvp_central_difference as hvp_central_difference,
)
from dho2_jax._numerics.operators import (
    hvp_reverse_over_reverse as hvp_reverse_over_reverse,
)
from dho2_jax._numerics.schedules import should_refresh as should_refresh
from dho2_jax._numerics.schedules import sweep_index as sweep_index
from dho2_jax._numerics.subspaces import Subspace as Subspace
from dho2_jax._refresh.across_axis import (
    staggered_value_and_grad as staggered_value_and_grad,
)
from dho2_jax._refresh.at_once import refresh as refresh
from dho2_jax._refresh.overlapped import overlapped_refresh as overlapped_refresh
from dho2_jax._state.config import STATIC_ARGS as STATIC_ARGS
from dho2_jax._state.restore import check_restorable as check_restorable
from dho2_jax._state.specs import abstract_state as abstract_state
from dho2_jax._state.specs import state_shardings as state_shardings
from dho2_jax._state.specs import state_specs as state_specs
from dho2_jax._state.states import DHO2State as DHO2State
from dho2_jax._state.states import set_enabled as set_enabled
from dho2_jax._state.views import metrics as metrics
from dho2_jax._state.views import subspace as subspace
from dho2_jax._transform import dho2 as dho2

__version__ = "0.1.0"
