"""Nothing to wire: options, fixtures and hooks are the plugin that peftbench registers."""
