"""Alignment and uniformity of models on STS-B dev (Table 2)."""

from st_kdmcse.cli.alignment_uniformity import main

if __name__ == "__main__":
    main()
