"""`python -m dev <subcommand> ...`: what `book.py` hands over to, inside the environment."""

import sys

import book
from dev import Problem


def run(args) -> int:
    "Call the module behind the subcommand (imported here, so that each pays only for its own imports)."
    if args.command == "edit":
        from dev import edit

        return edit.main(args.chapter, args.keep)
    if args.command == "refresh":
        from dev import refresh

        return refresh.main(args.chapter)
    if args.command == "export":
        from dev import export

        return export.main()
    if args.command == "lab":
        from dev import lab

        return lab.main(args.options)
    if args.command in ("train", "bench"):
        from dev import machine

        return {"train": machine.train, "bench": machine.bench}[args.command](args.options)
    if args.command == "test":
        from dev import check

        return check.main(fast=args.fast, full=args.full)
    if args.command == "read":
        from dev import read

        return read.main(args.chapter, once_only=args.once, port=args.port, browser=not args.no_browser)
    raise Problem(f"no subcommand {args.command!r}; see: python3 book.py --help")


def main() -> int:
    args = book.parse(sys.argv[1:])
    try:
        return run(args)
    except Problem as problem:
        return book.say(str(problem))
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in {"dev", "book"}:
            raise
        book.distrust_environment()
        return book.say(f"the environment is damaged ({error}); run the command again: it will be made anew")


if __name__ == "__main__":
    sys.exit(book.guarded(main))
