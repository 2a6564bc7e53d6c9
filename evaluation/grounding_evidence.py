"""The grounding experiment: train its arms over seeds, and test the differences that it is about."""

from st_kdmcse.cli.grounding_evidence import main

if __name__ == "__main__":
    main()
