"""Figure 7: train KDMCSE with several margins over seeds, and plot the score against the margin."""

from st_kdmcse.cli.margin_sweep import main

if __name__ == "__main__":
    main()
