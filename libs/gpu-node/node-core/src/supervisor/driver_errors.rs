//! Lines of an engine's log that tell of a driver or GPU which it does not get over.
//!
//! Engines write texts of clients too, with their line breaks, so such a line is a reason to ask the
//! driver and never a proof.

/// What a line of a fatal driver error begins with, behind the prefixes of the engine's log. Source:
/// ggml's CUDA code and PyTorch's exceptions; NVML's tools.
const DRIVER_ERRORS: [&str; 2] =
    ["CUDA error: ", "Failed to initialize NVML: Driver/library version mismatch"];
/// What follows the place in ggml's source at which it gave up.
const GIVEN_UP: [&str; 2] = ["CUDA error", "!\"CUDA error\""];

/// Whether an engine would write this line for an error of its driver or GPU that it does not get
/// over. Case counts, and so does the line's beginning.
pub fn fatal_driver_error(line: &str) -> bool {
    let line = without_prefixes(line.trim_end());
    let error = behind_exception(line).unwrap_or(line);
    DRIVER_ERRORS.iter().any(|form| error.starts_with(form)) || is_numbered(line) || is_located(line)
}

/// What an exception of PyTorch's says, as vLLM and TGI print it.
fn behind_exception(line: &str) -> Option<&str> {
    let (class, what) = line.split_once(": ")?;
    let is_torch = class.starts_with("torch.") && class.ends_with("Error") && !class.contains(' ');
    (is_torch || class == "RuntimeError").then_some(what)
}

/// ggml's older form: `CUDA error 700 at ggml-cuda.cu:12: an illegal memory access`.
fn is_numbered(line: &str) -> bool {
    let number = line.strip_prefix("CUDA error ").and_then(|rest| rest.split_once(" at "));
    number.is_some_and(|(number, _)| is_number(number))
}

/// A function or a place of ggml's, and that CUDA failed there.
fn is_located(line: &str) -> bool {
    let Some((place, what)) = line.split_once(": ") else { return false };
    let (file, number) = place.rsplit_once(':').unwrap_or((place, ""));
    let in_file = file.ends_with(".cu") && !file.contains(' ') && is_number(number);
    let in_function = place.starts_with("ggml_cuda_") && !place.contains(' ');
    (in_file && GIVEN_UP.contains(&what)) || (in_function && what.starts_with(GIVEN_UP[0]))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The line behind what loggers put before it.
fn without_prefixes(line: &str) -> &str {
    let line = behind_process(line).unwrap_or(line);
    let line = behind_level(line).unwrap_or(line);
    behind_time(line).unwrap_or(line)
}

/// vLLM's `(EngineCore_0 pid=12) `.
fn behind_process(line: &str) -> Option<&str> {
    let (name, rest) = line.strip_prefix('(')?.split_once(") ")?;
    let (_, pid) = name.rsplit_once(" pid=")?;
    is_number(pid).then_some(rest)
}

/// vLLM's `ERROR 11-25 12:00:00 [core.py:9] `.
fn behind_level(line: &str) -> Option<&str> {
    let mut words = line.strip_prefix("ERROR ")?.splitn(4, ' ');
    let (date, time, place, rest) = (words.next()?, words.next()?, words.next()?, words.next()?);
    (is_number(&date.replace('-', "")) && is_number(&time.replace(':', "")) && place.ends_with(']'))
        .then_some(rest)
}

/// llama.cpp's `0.12.345.678 E `.
fn behind_time(line: &str) -> Option<&str> {
    let (time, rest) = line.split_once(" E ")?;
    (time.contains('.') && is_number(&time.replace('.', ""))).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2406
    #[test]
    fn each_engines_own_form_of_a_driver_error_is_known() {
        for line in [
            "CUDA error: an illegal memory access was encountered",
            "0.12.345.678 E CUDA error: unspecified launch failure",
            "CUDA error 700 at ggml-cuda.cu:6951: an illegal memory access was encountered",
            "/build/ggml/src/ggml-cuda/ggml-cuda.cu:88: CUDA error",
            "ggml-cuda.cu:88: !\"CUDA error\"",
            "ggml_cuda_host_malloc: CUDA error: out of range",
            "RuntimeError: CUDA error: device-side assert triggered",
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
            "torch.cuda.SomeError: CUDA error: unspecified launch failure",
            "ERROR 11-25 12:00:00 [core.py:123] RuntimeError: CUDA error: uncorrectable ECC error encountered",
            "(EngineCore_0 pid=12) ERROR 11-25 12:00:00 [core.py:9] torch.AcceleratorError: CUDA error: x",
            "(EngineCore pid=12) RuntimeError: CUDA error: x",
            "Failed to initialize NVML: Driver/library version mismatch",
        ] {
            assert!(fatal_driver_error(line), "{line}");
        }
    }

    // CLOUD-2406
    #[test]
    fn a_text_that_only_speaks_of_an_error_is_none() {
        for line in [
            "parse: error parsing grammar: root ::= \"CUDA error: an illegal memory access\"",
            " CUDA error: indented as a quotation is",
            "cuda error: in other letters",
            "INFO 11-25 12:00:00 [logger.py:39] Received request: prompt: 'CUDA error: x'",
            "ERROR 11-25 12:00:00 [serving.py:1] bad prompt 'RuntimeError: CUDA error: x'",
            "ERROR now then here] CUDA error: x",
            "(a man with pid=x) CUDA error: x",
            "say E CUDA error: x",
            "CUDA error code at length",
            "my file.cu:1: CUDA error",
            "NVRM: Xid (PCI:0000:01:00): 79",
            "",
        ] {
            assert!(!fatal_driver_error(line), "{line}");
        }
    }
}
