"""How well teacher features tell pairs from strangers, and which threshold to filter false negatives with."""

from st_kdmcse.cli.threshold_statistics import main

if __name__ == "__main__":
    main()
