"""What the commands of ``hvd-qsgd`` do, each in a module; :mod:`hvd_qsgd.cli` has their options and prints."""
