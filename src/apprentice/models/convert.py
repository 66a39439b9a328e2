"""Former name of `apprentice.models.gguf`, kept so that `python -m apprentice.models.convert FILE FOLDER` still works."""

from apprentice.models.gguf import main

if __name__ == "__main__":
    main()
