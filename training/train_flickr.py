"""Train a sentence encoder on text and Flickr30k (wiki+flickr), or run the embedded demo with --demo."""

import sys

from st_kdmcse.cli.demo import main as demo
from st_kdmcse.cli.training import training_command

main = training_command("flickr")
main.epilog = "With --demo, it is `st-kdmcse demo`, which needs no data."

if __name__ == "__main__":
    if "--demo" in sys.argv:
        demo([argument for argument in sys.argv[1:] if argument != "--demo"])
    main()
