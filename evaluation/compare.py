"""Compare finished training runs: one report in Markdown, HTML and JSON."""

from st_kdmcse.cli.compare import main

if __name__ == "__main__":
    main()
