"""Policies: which codec a tensor gets, by its name and size and from epoch to epoch. One file per kind."""

from hvd_qsgd.policies.accordion import Accordion
from hvd_qsgd.policies.base import Fixed, Policy, Tensor
from hvd_qsgd.policies.lgreco import LGreCo
from hvd_qsgd.policies.rules import Rules, parse_codec
from hvd_qsgd.policies.warm_up import WarmUp

__all__ = ["Accordion", "Fixed", "LGreCo", "Policy", "Rules", "Tensor", "WarmUp", "parse_codec"]
