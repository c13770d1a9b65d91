"""`python -m perjoule`: the command, as launchers of many processes start it (`torchrun ... -m perjoule compress`)."""

from perjoule.cli.main import main

if __name__ == "__main__":
    main()
