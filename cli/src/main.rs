//! The `warren` command.

fn main() -> std::process::ExitCode {
    warren_cli::main()
}
