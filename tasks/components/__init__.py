"""The kinds of components: one module each, whose class ``Component`` the settings find by the module's name."""
