"""The former name of `apprentice.models.gguf`, for those who type `python -m apprentice.models.convert FILE FOLDER`."""

from apprentice.models.gguf import main

if __name__ == "__main__":
    main()
