"""Train a sentence encoder on text and MS-COCO (wiki+coco)."""

from st_kdmcse.cli.training import training_command

main = training_command("coco")

if __name__ == "__main__":
    main()
