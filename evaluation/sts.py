"""Score a model on the seven STS tasks."""

from st_kdmcse.cli.sts import main

if __name__ == "__main__":
    main()
