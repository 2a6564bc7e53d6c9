"""Maps of sentences under repeated dropout (Figures 8 to 12), and nearest neighbours of several models."""

from st_kdmcse.cli.visualize import main

if __name__ == "__main__":
    main()
