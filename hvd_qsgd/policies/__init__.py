"""Policies: which codec a tensor gets, by its name and size and from epoch to epoch.

One file per kind, one line here.
"""

from hvd_qsgd.policies.accordion import Accordion as Accordion
from hvd_qsgd.policies.base import Fixed as Fixed
from hvd_qsgd.policies.base import Policy as Policy
from hvd_qsgd.policies.base import Tensor as Tensor
from hvd_qsgd.policies.lgreco import LGreCo as LGreCo
from hvd_qsgd.policies.rules import Rules as Rules
from hvd_qsgd.policies.rules import parse_codec as parse_codec
from hvd_qsgd.policies.warm_up import WarmUp as WarmUp
