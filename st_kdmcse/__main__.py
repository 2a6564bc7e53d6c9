"""``python -m st_kdmcse`` is ``st-kdmcse``; ``torchrun -m st_kdmcse`` starts it on several devices."""

from st_kdmcse.cli.main import main

if __name__ == "__main__":
    main(prog_name="st-kdmcse")
