"""HTTP/1.1 over sockets: what engines and links to other sites are asked through."""
