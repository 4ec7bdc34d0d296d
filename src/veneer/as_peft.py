"""``python -m veneer.as_peft SCRIPT ...``: run a program written for ``peft`` on veneer, unmodified."""

from veneer.hf.as_peft import install_as_peft, main

__all__ = ["install_as_peft", "main"]

if __name__ == "__main__":
    main()
