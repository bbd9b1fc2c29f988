from hvd_qsgd.cli import main

main()
