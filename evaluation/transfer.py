"""Score a model on SentEval's transfer tasks."""

from st_kdmcse.cli.transfer import main

if __name__ == "__main__":
    main()
