"""All codecs, one line each: what is imported here is known by its ``name`` and public in ``hvd_qsgd``."""

from hvd_qsgd.codecs.cast import Cast as Cast
from hvd_qsgd.codecs.elias import EliasQSGD as EliasQSGD
from hvd_qsgd.codecs.identity import Identity as Identity
from hvd_qsgd.codecs.intsgd import IntSGD as IntSGD
from hvd_qsgd.codecs.minmax import MinMax as MinMax
from hvd_qsgd.codecs.powersgd import PowerSGD as PowerSGD
from hvd_qsgd.codecs.qsgd import QSGD as QSGD
from hvd_qsgd.codecs.random_k import RandomK as RandomK
from hvd_qsgd.codecs.rows import Rows as Rows
from hvd_qsgd.codecs.scaled import Scaled as Scaled
from hvd_qsgd.codecs.sign import Sign as Sign
from hvd_qsgd.codecs.topk import TopK as TopK
from hvd_qsgd.codecs.topk_global import GlobalTopK as GlobalTopK
from hvd_qsgd.codecs.topk_rows import RowTopK as RowTopK
from hvd_qsgd.codecs.topk_threshold import ThresholdTopK as ThresholdTopK
