//! The `vmft` command line.

fn main() -> anyhow::Result<()> {
    Ok(())
}
