"""`python -m trl_ext`: the `trl-ext` command in one process, under whatever launcher started it."""

from trl_ext.scripts.command import main

if __name__ == "__main__":
    main(launcher=False)
