# shellcheck shell=bash
# What the launch scripts share: options, errors, quoting. Sourced, not run; works from bash 3.2.
#
# A script names what it takes in OPTIONS (--NAME=VALUE, into the variable NAME, hyphens as
# underscores), LISTS (--NAME=VALUE any number of times, into the array of that name) and FLAGS
# (--NAME, into the variable as 1), and then calls parse_arguments "$@", which leaves the
# layerskip command in COMMAND.

PROGRAM=launch/${0##*/}
COMMAND=()
# The exit codes of `layerskip train`: stopped, so go on; and bad input, so don't.
# shellcheck disable=SC2034  # the scripts read them
RESTART=75 BAD_INPUT=2

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

refuse() {
  say "$*"
  exit 2
}

# The comment at the head of the script.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# quoted WORD...: the words as a shell would read them back.
quoted() {
  local word line=''
  for word in "$@"; do
    # printf %q would also escape what needs no escape, and so hide what is passed through.
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+="$word "
    else
      line+="'${word//\'/\'\\\'\'}' "
    fi
  done
  printf '%s' "${line% }"
}

is_in() { [[ " $2 " == *" $1 "* ]]; }

# Locals begin with an underscore: options go into variables of their own names.
parse_arguments() {
  local _word _option _value
  while (($#)); do
    _word=$1
    shift
    case $_word in
      --)
        COMMAND=("$@")
        break
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --*=*)
        _option=${_word%%=*} _option=${_option#--} _value=${_word#*=}
        if is_in "$_option" "$LISTS"; then
          # eval, as bash 3.2 has no reference to an array by its name.
          eval "${_option//-/_}+=(\"\$_value\")"
        elif is_in "$_option" "$OPTIONS"; then
          printf -v "${_option//-/_}" %s "$_value"
        elif is_in "$_option" "$FLAGS"; then
          refuse "$_word: --$_option takes no value"
        else
          unknown "$_option"
        fi
        ;;
      --*)
        _option=${_word#--}
        if is_in "$_option" "$FLAGS"; then
          printf -v "${_option//-/_}" %s 1
        elif is_in "$_option" "$OPTIONS $LISTS"; then
          refuse "--$_option needs its value behind an equals sign: --$_option=VALUE"
        else
          unknown "$_option"
        fi
        ;;
      *) refuse "'$_word' is no option; the layerskip command comes behind --: -- train ..." ;;
    esac
  done
  if ((${#COMMAND[@]} == 0)); then
    refuse "no layerskip command; give it behind --, as in -- train --config=... --workdir=..."
  fi
}

unknown() { refuse "--$1 is no option of this script; there are: $OPTIONS $LISTS $FLAGS"; }

# need OPTION...: refuses options that are missing.
need() {
  local _option _variable
  for _option in "$@"; do
    _variable=${_option//-/_}
    [[ -n ${!_variable} ]] || refuse "--$_option is missing; --help tells what it is"
  done
}

# whole LEAST OPTION...: refuses what is no whole number of at least LEAST.
whole() {
  local _option _variable _least=$1
  shift
  for _option in "$@"; do
    _variable=${_option//-/_}
    if ! [[ ${!_variable} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!_variable} < _least)); then
      refuse "--$_option=${!_variable} must be a whole number of at least $_least"
    fi
  done
}

# matching OPTION PATTERN WHAT: refuses a value, if given, that does not match.
matching() {
  local _variable=${1//-/_}
  [[ -z ${!_variable} || ${!_variable} =~ $2 ]] || refuse "--$1=${!_variable} must be $3"
}

# pairs OPTION VALUE...: refuses elements of a list that are not NAME=VALUE.
pairs() {
  local _option=$1 _pair
  shift
  for _pair in "$@"; do
    [[ $_pair =~ ^[A-Za-z_][A-Za-z0-9_./-]*=.+$ ]] ||
      refuse "--$_option=$_pair must be --$_option=NAME=VALUE"
  done
}

# exclusive WHY OPTION...: refuses options that are given.
exclusive() {
  local _option _variable
  for _option in "${@:2}"; do
    _variable=${_option//-/_}
    [[ -z ${!_variable-} ]] || refuse "--$_option is $1"
  done
}

# The --workdir of the command, or nothing.
workdir() {
  local word
  for word in "${COMMAND[@]}"; do
    [[ $word == --workdir=* ]] && printf '%s' "${word#*=}"
  done
  return 0
}
