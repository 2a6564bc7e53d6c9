"""Train a sentence encoder on text and CC12M (Appendix B)."""

from st_kdmcse.cli.training import training_command

main = training_command("cc12m")

if __name__ == "__main__":
    main()
