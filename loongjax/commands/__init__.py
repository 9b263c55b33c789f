"""Sub-commands of `loongjax` that belong to no other room."""
