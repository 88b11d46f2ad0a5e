"""Words of options."""

FOLDER_NAMES = "folders"  # classnames of who wants the class folders' own names, whatever they are
