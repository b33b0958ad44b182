"""What tests share: servers, files, models, links."""
