//! The kernel command line of the default guest.
