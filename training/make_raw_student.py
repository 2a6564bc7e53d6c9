"""Make a raw student by masked language modelling."""

from st_kdmcse.cli.raw_student import main

if __name__ == "__main__":
    main()
