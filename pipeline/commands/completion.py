"""`python -m pipeline completion`: what makes a shell complete these command lines; it prints a few lines to be read.

They ask the interpreter on the command line what could come next, so a recipe's own keys are completed too; for other
modules, and where a file is to be named, the shell's own completion stays.
"""

import argparse

from pipeline.errors import RecipeError

HELP = "print what makes bash, zsh or fish complete sub-commands, recipes, keys and values"
EXAMPLES = (
    'eval "$(python -m pipeline completion bash)"',
    'eval "$(python -m pipeline completion zsh)"',
    "python -m pipeline completion fish | source",
)
SHELLS = {
    "bash": """\
_logitbank() {
    local line="${COMP_LINE:0:COMP_POINT}" key="" word reply
    COMPREPLY=()
    [[ $line == *" -m "* ]] || return
    word="${line##*[[:space:]]}"
    [[ $word == *=* ]] && key="${word%"${word##*=}"}"
    while IFS= read -r reply; do
        COMPREPLY+=("${reply#"$key"}")
    done < <("${1/#\\~/$HOME}" -m pipeline completion --line "$line" 2> /dev/null)
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
}
complete -o bashdefault -o default -F _logitbank python python3
""",
    "zsh": """\
autoload -U compinit && (( $+functions[compdef] )) || compinit
_logitbank() {
    local -a replies
    replies=("${(@f)$("${words[1]/#\\~/$HOME}" -m pipeline completion \
--line "${(j: :)words[1,CURRENT]}" 2> /dev/null)}")
    replies=(${replies:#})
    (( $#replies )) || { _files; return }
    compadd -S '' -- ${(M)replies:#*=}
    compadd -- ${replies:#*=}
}
compdef _logitbank python python3
""",
    "fish": """\
function __logitbank
    set -l words (commandline -opc) (commandline -ct)
    $words[1] -m pipeline completion --line (string join ' ' -- $words) 2> /dev/null
end
complete -c python -c python3 -a '(__logitbank)'
""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A shell's name; `--line` is for the lines that are printed."""
    parser.add_argument("shell", nargs="?", choices=SHELLS, metavar="|".join(SHELLS), help="which shell")
    parser.add_argument("--line", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Print a shell's lines, or the words that could come next on a line."""
    if args.line is not None:
        from pipeline.completion import completions

        for word in completions(args.line):
            print(word)
    elif args.shell is None:
        raise RecipeError(f"completion: which shell? One of {', '.join(SHELLS)}; for example:\n  {EXAMPLES[0]}")
    else:
        print(SHELLS[args.shell], end="")
    return 0
