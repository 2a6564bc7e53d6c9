"""Tables 3 and 5: train the methods over seeds, and compare them."""

from st_kdmcse.cli.ablation import main

if __name__ == "__main__":
    main()
